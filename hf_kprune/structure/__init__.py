"""Where units are: families of models, their live sublayers, how they are walked, cut and proved."""
