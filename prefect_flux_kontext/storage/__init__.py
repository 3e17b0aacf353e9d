"""Files and small databases on any filesystem."""
