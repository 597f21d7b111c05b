"""Data: readers, formats, canonical rows, report, rendering and loss mask, split."""
