"""Many runs: grids over the fields of a configuration, and the tables of papers."""
