"""`fastlora train`: a settings file and rows of text, to an adapter, by way of transformers' Trainer."""
