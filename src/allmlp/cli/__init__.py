"""The `mixer` command: parses arguments, calls one function of a lower layer, prints the result."""
