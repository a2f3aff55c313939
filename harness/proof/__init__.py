"""Is an implementation right, does it repeat, how fast is it: operators at real sizes against fp64, and a timer."""
