"""How good a circuit is: faithfulness, completeness, minimality, nulls, and the published track."""
