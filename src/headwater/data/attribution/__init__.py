"""Attribution to examples: which training sequences a behavior is put down to, and whether it falls without them."""
