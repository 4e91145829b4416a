"""The experiments of the paper, built on everything else; nothing else imports this."""
