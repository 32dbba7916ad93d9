"""The shapes of rows that data sets have, and the parts they are made of."""
