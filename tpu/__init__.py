"""`python -m tpu`: Cloud TPU VMs made, set up, run on and deleted, by gcloud, all workers at once.

Standard library only: it runs on a laptop that has no jax. tpu/README.md says how it is used.
"""
