"""Statistics of evaluations: means with bootstrap intervals, and trade-off curves that can be compared.

- `intervals`: means of independent or of clustered values.
- `crossed`: means over concepts crossed with prompts.
- `tradeoff`: text similarity against image similarity over a sweep of the bias.
"""
