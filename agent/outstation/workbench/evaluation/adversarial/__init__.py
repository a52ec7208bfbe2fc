"""Attacks on a model's input: changes within sensor limits that flip its answers, found without its gradients."""
