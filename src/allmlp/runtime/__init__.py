"""Where the program computes: device, precision, threads, processes."""
