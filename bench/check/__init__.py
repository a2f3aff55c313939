"""`make gpu-check`: everything that only a GPU can tell, part by part."""
