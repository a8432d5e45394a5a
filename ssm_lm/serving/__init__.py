"""A trained model in use: many users at once, or one at a terminal. A user's past is a state of constant size."""
