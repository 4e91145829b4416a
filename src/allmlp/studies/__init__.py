"""Many runs -> a table or a figure of the paper."""
