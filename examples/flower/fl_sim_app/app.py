"""Flower looks for plain assignments here."""

import fl_sim.simulation.flower_app

server = fl_sim.simulation.flower_app.server
client = fl_sim.simulation.flower_app.client
