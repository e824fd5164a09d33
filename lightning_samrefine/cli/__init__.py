"""The `samrefine` command and its Hydra configs."""
