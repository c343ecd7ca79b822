"""From logits, their Jacobian and an input to every quantity; it knows no model."""
