"""The experiments of the paper, on top of everything else; nothing else imports them."""
