"""Device functions on the heads of a paged cache, as attention reads them."""
