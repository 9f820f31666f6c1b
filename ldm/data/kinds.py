"""Words for everyday kinds of things, animals and people: what photos of a subject may show."""
from __future__ import annotations

# Things of a house and a desk, toys, clothes, food, vehicles, animals, people and plants, in the words of speech.
EVERYDAY_KINDS = tuple(words.strip() for words in """
teddy bear, doll, toy, toy car, stuffed animal, plush toy, action figure, figurine, puppet, robot, board game, dice,
playing cards, jigsaw puzzle, rubber duck, balloon, kite, ball, football, basketball, tennis ball, tennis racket,
baseball glove, skateboard, surfboard, snowboard, skis, dumbbell, trophy, medal, chair, armchair, sofa, stool, bench,
table, desk, bed, cradle, lamp, floor lamp, chandelier, lantern, candle, candlestick, clock, alarm clock, wristwatch,
mirror, picture frame, painting, poster, sculpture, statue, bust, vase, pot, flowerpot, bowl, plate, cup, mug, teapot,
coffee maker, kettle, bottle, water bottle, wine glass, glass, jug, pitcher, can, jar, spoon, fork, knife, pan,
toaster, blender, microwave, oven, refrigerator, washing machine, vacuum cleaner, iron, broom, bucket, basket, box,
treasure chest, suitcase, backpack, handbag, purse, wallet, umbrella, key, padlock, door, window, curtain, carpet,
pillow, blanket, towel, soap, toothbrush, perfume bottle, lipstick, comb, hair dryer, scissors, needle, button,
hammer, screwdriver, wrench, drill, saw, axe, shovel, ladder, toolbox, watering can, lawn mower, pen, pencil,
notebook, book, magazine, envelope, globe, map, calculator, computer, laptop, keyboard, computer mouse, monitor,
printer, telephone, smartphone, tablet, television, radio, loudspeaker, headphones, microphone, camera, film camera,
video camera, telescope, microscope, binoculars, game controller, typewriter, sewing machine, record player, vinyl
record, guitar, electric guitar, violin, cello, piano, drum, trumpet, saxophone, flute, harp, accordion, bell, music
box, hat, cap, helmet, crown, wig, glasses, sunglasses, mask, scarf, tie, necklace, ring, earring, bracelet, brooch,
belt, glove, shirt, t-shirt, sweater, hoodie, jacket, coat, dress, skirt, trousers, jeans, shorts, sock, shoe,
sneaker, boot, sandal, high heel, slipper, swimsuit, wedding dress, costume, armor, sword, shield, bow, anchor, flag,
coin, banknote, gift, christmas tree, snowman, scarecrow, pumpkin, jack-o'-lantern, apple, pear, orange, lemon,
banana, strawberry, cherry, grapes, peach, pineapple, watermelon, avocado, coconut, tomato, carrot, potato, onion,
garlic, pepper, cucumber, eggplant, corn, cabbage, mushroom, bread, croissant, pretzel, bagel, sandwich, burger, hot
dog, pizza, pasta, sushi, soup, salad, egg, cheese, steak, cake, cupcake, pie, donut, cookie, chocolate, candy, ice
cream, coffee, tea, beer, wine, car, sports car, vintage car, race car, truck, pickup truck, van, bus, tram, train,
locomotive, motorcycle, scooter, bicycle, tricycle, tractor, excavator, fire engine, ambulance, police car, taxi,
boat, sailboat, ship, canoe, submarine, airplane, helicopter, drone, rocket, spaceship, hot air balloon, wheel, tire,
engine, traffic light, road sign, street lamp, mailbox, fire hydrant, trash can, bridge, house, cottage, castle,
church, temple, tower, lighthouse, windmill, barn, skyscraper, tent, fountain, well, fence, gate, stairs, dog, puppy,
corgi, poodle, bulldog, german shepherd, golden retriever, labrador, dachshund, chihuahua, husky, pug, cat, kitten,
horse, pony, donkey, cow, bull, pig, sheep, goat, rabbit, hamster, guinea pig, mouse, rat, squirrel, hedgehog, fox,
wolf, bear, polar bear, panda, raccoon, otter, beaver, deer, moose, elephant, rhinoceros, hippopotamus, giraffe,
zebra, camel, lion, tiger, leopard, cheetah, monkey, gorilla, kangaroo, koala, sloth, bat, dolphin, whale, seal,
penguin, chicken, rooster, duck, goose, swan, turkey, pigeon, crow, parrot, owl, eagle, hawk, flamingo, peacock,
hummingbird, turtle, tortoise, lizard, chameleon, snake, crocodile, frog, fish, goldfish, shark, seahorse, octopus,
jellyfish, crab, lobster, snail, shell, starfish, butterfly, bee, ladybug, beetle, dragonfly, spider, dinosaur,
dragon, unicorn, monster, alien, angel, mermaid, man, woman, boy, girl, baby, old man, old woman, person, face, hand,
clown, soldier, knight, astronaut, chef, dancer, cartoon character, logo, flower, rose, tulip, sunflower, orchid,
cactus, succulent, bonsai, fern, houseplant, palm tree, tree, leaf, stone, crystal
""".replace("\n", " ").split(","))
