"""The paper's study: data, networks, robustified training, attacks and the report that `fastsal study` writes."""
