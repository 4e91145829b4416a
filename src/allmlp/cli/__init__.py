"""The `mixer` command: parse, call one function of the floors below, print."""
