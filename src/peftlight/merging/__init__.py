"""Base and adapter as one plain model on the disk, with a certificate of what it computes."""
