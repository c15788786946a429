"""What `model.export` is made of: tracing, attention as operators, rounding as Q/DQ nodes, tensors outside of the graph's file."""
