"""What a model with an adapter will be: what computes each layer, what trains, and the memory of a training step.

Nothing of the model is needed but its config: everything here runs on tensors without data.
"""

from .plan import Plan, plan

__all__ = ["Plan", "plan"]
