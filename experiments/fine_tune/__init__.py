"""What time adds to a model that was trained with softmax attention."""
