"""Parts of a batch: each reads, computes, saves and confirms one concern; the batch itself knows none of them."""
