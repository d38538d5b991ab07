"""The benchmark and the demo: outside clients that start servers and speak only public HTTP."""
