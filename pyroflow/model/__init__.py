"""What is known of a Pyro model: its latents' supports, and its priors."""
