"""What a training step launches on a Mac, counted from the graph it builds, on any machine.

`count.counting` counts a step without computing its numbers, `metal` gives it the primitives that MLX would choose on
Metal, `kernels` says what each of them launches, reads and multiplies, and `cost_model` puts a roofline under that.
"""
