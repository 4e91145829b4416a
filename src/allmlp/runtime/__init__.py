"""Device, precision, threads and processes."""
