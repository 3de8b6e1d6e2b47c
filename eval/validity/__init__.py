"""Whether what a model says about methods carries over to photographs: the criteria of `eval.validate`."""
