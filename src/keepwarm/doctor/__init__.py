"""What costs warmth in a deployment, in plain words: facts are collected, then judged by rules."""
