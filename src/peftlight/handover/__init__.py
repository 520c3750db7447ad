"""What is given to others: an adapter's card, its way to the hub and back, and the lines that serve it elsewhere."""
