"""What is wrong: with a document, with its bytes, or by the text of an error."""
