"""One module for each family: where its tokens are, and the subclasses of its attention. Imported when it is needed."""
