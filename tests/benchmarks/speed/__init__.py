"""What a planar stack costs: against other libraries, against bare arithmetic, and as it grows."""
