"""`ssm-lm bench`: what the kernels ask of a GPU, and how fast they are beside others."""
