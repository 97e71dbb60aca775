"""Training and inference loops over tiles. Needs torch only; slides come in as read functions and arrays."""
