"""What a run leaves for people: results, statistics, thumbnails, gallery."""
