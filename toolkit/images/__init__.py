"""From folders to pixels: datasets, scan, decode."""
