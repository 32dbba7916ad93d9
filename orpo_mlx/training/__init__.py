"""The parts of a training run: data order, gradients, steps, evaluation, reference, output."""
