"""Speech to text: audio in; words, their times and pauses out."""
