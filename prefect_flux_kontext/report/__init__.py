"""Reports of a batch: result manifest, statistics, thumbnails, gallery and contact sheet."""
