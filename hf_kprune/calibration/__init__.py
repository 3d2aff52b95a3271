"""What the data say: rows, batches, the knowledge that a task head holds, and the sums over them."""
