"""The kinds of requests that clients know, each as one module: what it may say, and how its answer is read."""
