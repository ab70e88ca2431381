"""From a weight and a Hessian to codes. Pure tensors: no model, no files."""
