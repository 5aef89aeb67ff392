"""What plugs into the trainers of others: callbacks for Transformers' Trainer, and a module for each other program."""
