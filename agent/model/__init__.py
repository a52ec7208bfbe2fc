"""Models: bundles, inference and the sandbox that models are tried in.

bundle     manifest, signature, golden vectors, built-in bundles
inference  rows → windows → model → labels and scores; the only importer of TFLite is `inference.runtime`
sandbox    probing, autotuning and running models in child processes
activation verify, probe and load a bundle
"""
