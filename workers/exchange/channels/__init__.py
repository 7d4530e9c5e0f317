"""The channels: what each says of the market, and how frames reach their subscribers."""
