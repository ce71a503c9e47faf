"""The word lists of caption_questions.py, for captions of everyday photographs in English.

A table is text with an entry between slashes: "name: form form". The name is a form too if it is one word.
"""


def by_form(table: str) -> dict[str, str]:
    """{form: name}."""
    found = {}
    for entry in " ".join(table.split()).split(" / "):
        name, _, forms = entry.partition(":")
        found.update(dict.fromkeys([*forms.split(), *([] if " " in name else [name])], name))
    return found


NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
NUMBERS |= {str(n): n for n in range(1, 9)}
ARTICLES = {"a", "an", "the", "his", "her", "its", "their", "some", "this", "another"}

# ---- persons and animals: every word that may be the subject of a question

PERSONS = by_form("""
    man: guy gentleman businessman fisherman cowboy policeman groom / woman: lady bride ballerina cheerleader / boy / girl
    / child: kid toddler baby infant youngster / person: someone somebody player skateboarder snowboarder rider skier
    surfer biker climber cyclist bicyclist hiker runner motorcyclist racer wrestler goalie wakeboarder rollerblader
    teenager teen adult individual performer dancer swimmer kayaker jogger worker musician guitarist singer driver
    pedestrian athlete quarterback batter pitcher gymnast catcher referee diver boxer soldier clown student artist vendor
    passenger fan rower skater unicyclist snowmobiler golfer bmxer figure friend
""")
SEVERAL_PERSONS = by_form("""
    man: men guys gentlemen / woman: women ladies / boy: boys / girl: girls / child: children kids toddlers babies /
    person: people persons players skateboarders snowboarders riders skiers surfers bikers climbers cyclists bicyclists
    hikers runners motorcyclists racers wrestlers teenagers teens adults performers dancers swimmers kayakers workers
    musicians pedestrians athletes boxers soldiers students friends couple team teams band family
""")
CROWDS = set(
    "group crowd bunch audience spectators onlookers fans others everyone bystanders many several crowded busy parade".split()
)
# whom a word may name: "a person" may be a man
MAY_BE = {
    "man": {"man"},
    "woman": {"woman"},
    "boy": {"boy"},
    "girl": {"girl"},
    "child": {"child", "boy", "girl"},
    "person": {"person", "man", "woman", "boy", "girl", "child"},
}
PLURALS = {"man": "men", "woman": "women", "child": "children", "person": "people"}  # others end in "s"
ANIMALS = by_form("""
    dog: puppy pup greyhound retriever labrador poodle terrier shepherd collie dalmatian doggy beagle husky bulldog
    pitbull dachshund rottweiler spaniel / cat: kitten / horse: pony / bird: duck seagull pigeon gull goose parrot eagle /
    cow: bull / sheep: lamb / goat / monkey / elephant / camel / deer / rabbit / squirrel
""")
SEVERAL_ANIMALS = by_form("""
    dog: dogs puppies greyhounds poodles terriers / cat: cats kittens / horse: horses ponies / bird: birds ducks seagulls
    pigeons geese / cow: cows cattle / goat: goats / monkey: monkeys / camel: camels / deer: deers
""")

# ---- what is seen: colours, things, places

COLORS = {w: w for w in "black white brown red blue yellow green orange pink purple gray tan beige gold silver".split()}
COLORS |= {"grey": "gray", "golden": "gold", "blonde": "blond", "blond": "blond"}
# Things with one colour. Clothes are asked about where there is one person.
CLOTHES = by_form("""
    shirt: t-shirt tshirt jersey / jacket: coat / dress / hat / cap / helmet / shorts / pants: trousers jeans / sweater:
    sweatshirt / vest / skirt / scarf / hair: haired / wetsuit / uniform / suit / outfit / swimsuit: bikini / headband:
    bandanna bandana / backpack / costume / boots / shoes / gloves
""")
COLORED = by_form("""
    ball / toy / frisbee: disc disk / collar / car / bike: bicycle / motorcycle: motorbike / slide / surfboard / kayak:
    canoe / boat / umbrella / rope / leash / wall / building: house / raft / sled / tent / truck / couch / bench / blanket
    / bucket / bag: purse / skateboard / snowboard / scooter / chair / tube / balloon / flag / fence / flower: flowers /
    jeep / bird: duck / horse / cat / train / bus / swing / tunnel / door / towel / sky / guitar / mat
""")
# What can be held, ridden, chased, sat on. The name is the answer.
THINGS = by_form("""
    ball: balls football soccerball basketball volleyball baseball softball / stick: branch / toy: toys doll / frisbee:
    disc disk frisbees / bike: bicycle bikes bicycles / motorcycle: motorbike / wave: waves / horse: pony bull /
    skateboard / scooter / unicycle / tricycle / surfboard / snowboard / sled / atv / swing: swings / slide / raft / boat:
    canoe kayak / bus / train / camera: video-camera camcorder / sign / rope / cup: mug / bottle / can / beer / glass /
    drink: beverage soda / umbrella / bat / racket: racquet / flag: flags / cigarette / paddle: oar / guitar / violin /
    accordion / flute / bagpipe: bagpipes / drum: drums / piano / trumpet / saxophone / newspaper: paper newspapers / book
    / magazine / baby: infant / dog: puppy / bird: duck / cat / trophy / bag: purse bags / bucket: pail / basket / box /
    pole: poles / microphone / phone: cellphone / balloon: balloons / flower: flowers / fish / backpack / hose / shovel /
    sword: swords / gun / bone / shoe: shoes / towel / blanket / glove / cart / stroller / wagon / carriage / wheelchair /
    bench / chair: armchair stool / couch: sofa / bed / rock: rocks boulder / ground / wall / grass: lawn / sidewalk /
    floor / curb / table / dock: pier / stairs: steps step staircase / ledge / stage / fence / tree: trees / cliff /
    mountain / hill / ladder / hurdle: hurdles / obstacle: obstacles / log: logs / bar / barrier / fountain / trampoline /
    bubble: bubbles / snowball / apple / peach / popsicle / cookie / cake / sandwich / ice-cream: icecream / candy:
    lollipop / bread / food: snack / hat / pool / river: stream / ocean / lake / pond / puddle
""")
HEADWEAR = by_form("""
    hat: hats / cap / helmet / headband: sweatband / bandana: bandanna / hood / wig / scarf: headscarf turban / goggles /
    sunglasses / headphones / crown: tiara / mask
""")
WORN = {form: name for form, name in (CLOTHES | HEADWEAR).items() if name not in ("hair", "backpack", "wig")}
VEHICLES = by_form("""
    bike: bicycle bikes bicycles bmx / motorcycle: motorbike motorcycles dirtbike / car: cars racecar automobile / boat:
    boats sailboat rowboat speedboat / kayak: canoe kayaks / raft / truck: pickup / train: subway / bus / atv:
    four-wheeler / scooter / sled: sleigh / jeep / tractor / snowmobile / unicycle / wheelchair / stroller / tricycle
""")
SPORTS = by_form("""
    soccer / football: quarterback / basketball / tennis / baseball: softball / hockey / volleyball: vollyball / rugby /
    cricket / lacrosse / golf: golfer / wrestling: wrestlers wrestler / boxing: boxer boxers / surfing: surfer surfers
    surfboard surfs / skateboarding: skateboarder skateboarders skateboard skateboards / snowboarding: snowboarder
    snowboard snowboarders / skiing: skier skis skiers / cycling: cyclist cyclists bicyclist bicyclists bmx bicycling /
    climbing: climber climbers / kayaking: kayak kayaker canoe / skating: skaters rollerblades rollerblading rollerblader
    ice-skating skates / wakeboarding: wakeboarder wakeboard waterskiing waterskier / motocross / diving: diver / karate:
    judo / gymnastics: gymnast / fencing / ping-pong / bowling / horse-riding: horseback jockey
""")
PLACES = by_form("""
    in the snow: snow / in the water: water / on the beach: beach shore seashore / in the ocean: ocean sea surf / in the
    grass: grass lawn / in a field: field meadow pasture / on the street: street road intersection crosswalk / on the
    sidewalk: sidewalk pavement / in a park: park / in a pool: pool / on the sand: sand / in the woods: woods forest / on
    a mountain: mountain mountains mountaintop mountainside / on a hill: hill hillside slope / on a path: path trail / on
    a track: track racetrack / on a court: court / in a lake: lake pond / in a river: river stream creek rapids / in a
    yard: yard backyard / on a bench: bench / on a couch: couch sofa / on a bed: bed / on a swing: swing swings / on a
    slide: slide / on a ramp: ramp half-pipe halfpipe / on a rock: rock rocks boulder / on a cliff: cliff / on a stage:
    stage / on the ice: ice / in the mud: mud / on the stairs: stairs steps staircase / in a boat: boat canoe kayak raft /
    in a restaurant: restaurant cafe bar diner / in a kitchen: kitchen / in a store: store shop market supermarket / at a
    playground: playground / in a fountain: fountain / in a car: car / on a trampoline: trampoline / on a bridge: bridge /
    in the desert: desert dunes dune / in the dirt: dirt / on a train: train subway / in a gym: gym gymnasium / in a
    stadium: stadium arena / on a dock: dock pier / at a table: table / in a puddle: puddle / in a crowd: crowd / in a
    parade: parade / on the floor: floor carpet / in a chair: chair / on a wall: wall / in the leaves: leaves
""")

# ---- what is done: bare form, form in -s, form in -ing

VERBS = """
    run runs running / walk walks walking / jump jumps jumping / leap leaps leaping / play plays playing / sit sits sitting
    stand stands standing / climb climbs climbing / swim swims swimming / ride rides riding / race races racing
    dance dances dancing / eat eats eating / drink drinks drinking / sleep sleeps sleeping / lie lies lying
    lay lays laying / fly flies flying / surf surfs surfing / ski skis skiing / skate skates skating / slide slides sliding
    swing swings swinging / fight fights fighting / wrestle wrestles wrestling / fish fishes fishing / read reads reading
    talk talks talking / sing sings singing / paint paints painting / dig digs digging / hike hikes hiking
    dive dives diving / kick kicks kicking / throw throws throwing / catch catches catching / chase chases chasing
    hug hugs hugging / kiss kisses kissing / push pushes pushing / pull pulls pulling / paddle paddles paddling
    row rows rowing / drive drives driving / smoke smokes smoking / splash splashes splashing / roll rolls rolling
    snowboard snowboards snowboarding / skateboard skateboards skateboarding / wade wades wading / crawl crawls crawling
    kneel kneels kneeling / float floats floating / shake shakes shaking / bark barks barking / shop shops shopping
    box boxes boxing / juggle juggles juggling / bowl bowls bowling / march marches marching / cook cooks cooking
    pose poses posing / chew chews chewing / bite bites biting / fall falls falling / hang hangs hanging
    kayak kayaks kayaking / jog jogs jogging / sniff sniffs sniffing / tackle tackles tackling / fetch fetches fetching
    hold holds holding / carry carries carrying / hit hits hitting / wait waits waiting / cross crosses crossing
    blow blows blowing / rest rests resting / perform performs performing / practice practices practicing
"""
FORMS = [verb.split() for verb in VERBS.strip().replace("\n", "/").split("/")]
GERUNDS = {ing: ing for _, _, ing in FORMS} | {s: ing for _, s, ing in FORMS}
BARE = {bare: ing for bare, _, ing in FORMS}  # of subjects in the plural
GERUNDS |= {
    "laying": "lying",
    "lays": "lying",
    "leaping": "jumping",
    "leaps": "jumping",
    "jogging": "running",
    "jogs": "running",
}
BARE |= {"lay": "lying", "leap": "jumping", "jog": "running"}
# said beside what is done, or too vague to be an answer
NOT_AN_ACTIVITY = set("holding carrying performing practicing hitting hanging waiting catching throwing".split())

# ---- "what is the dog chasing?": the verb of the question and the verbs, or verb and preposition, of captions
OBJECT_OF = {
    "holding": ("holding", "carrying"),
    "riding": ("riding",),
    "throwing": ("throwing",),
    "catching": ("catching",),
    "chasing": ("chasing",),
    "eating": ("eating", "chewing", "biting"),
    "kicking": ("kicking",),
    "pulling": ("pulling",),
    "pushing": ("pushing",),
    "climbing": ("climbing", "climbing on", "climbing up"),
    "playing with": ("playing with",),
    "playing": ("playing",),
    "reading": ("reading",),
    "sitting on": ("sitting on", "sitting in"),
    "lying on": ("lying on", "sleeping on", "resting on"),
    "standing on": ("standing on",),
    "jumping over": ("jumping over",),
    "jumping into": ("jumping into", "diving into", "jumping in"),
}
PARTICLES = {"on", "up", "with", "over", "into", "in"}

# ---- "is there a dog?": yes if a caption has one of the first words; no only if none has one of those or of the second
PRESENCE = {
    "a dog": (
        "dog dogs puppy puppies greyhound retriever labrador poodle terrier",
        "animal animals pet pup shepherd collie",
    ),
    "a horse": ("horse horses pony", "rodeo cowboy bull jockey animal carriage horseback polo"),
    "a bird": ("bird birds duck ducks seagull seagulls pigeon pigeons goose geese", "animal flock eagle parrot gull"),
    "a cat": ("cat kitten cats", "animal"),
    "a man": ("man men guy", ""),
    "a woman": ("woman women lady ladies bride", ""),
    "a boy": ("boy boys", ""),
    "a girl": ("girl girls", ""),
    "a child": ("child children kid kids boy boys girl girls baby toddler", ""),
    "a bike": (
        "bike bicycle bikes bicycles",
        "biker bikers cyclist cyclists bicyclist bmx biking motorcycle cycle unicycle",
    ),
    "a motorcycle": (
        "motorcycle motorbike motorcycles",
        "motorcyclist bike biker dirtbike bikes vehicle motocross moped atv",
    ),
    "a skateboard": ("skateboard skateboards skateboarder skateboarding", "board ramp skater skate skating"),
    "a surfboard": ("surfboard surfer surfing surfboards", "board wave surf surfs waves wakeboard boogie"),
    "a snowboard": ("snowboard snowboarder snowboarding", "board ski skier skiing skis snow"),
    "a ball": (
        "ball balls",
        "football basketball soccer tennis baseball volleyball softball rugby cricket game sport play catch",
    ),
    "a frisbee": ("frisbee frisbees", "disc disk toy plastic object ring something catch"),
    "a guitar": ("guitar guitars guitarist", "instrument instruments band music musician musicians concert"),
    "a boat": ("boat boats sailboat", "canoe kayak raft water lake ocean river ship dock harbor sea paddle rowing"),
    "a car": ("car cars", "street road traffic vehicle truck city race van jeep parking suv taxi"),
    "a swing": ("swing swings", "swinging playground hammock rope"),
    "a slide": ("slide slides", "sliding playground tube inflatable"),
    "a pool": ("pool pools", "water swimming swim swims diving dive splash swimmer"),
    "a beach": ("beach", "sand sandy ocean shore water sea seashore wave waves surf surfing surfer coast"),
    "snow": (
        "snow snowy snowboarder skier sledding snowball",
        "ski skiing winter ice sled cold icy white skis snowboard frozen",
    ),
    "water": (
        "water ocean lake river pool stream pond sea",
        "wave waves beach surf surfing surfers surfboard paddle swim swimming boat wet splash splashes "
        "splashing fountain fishing fish bath kayak canoe shore creek puddle dock raft surfer sprinkler rain wading bridge "
        "hose waterfall snow ice diving bathing rapids underwater wakeboard waterskiing drink drinks cup bottle",
    ),
    "grass": (
        "grass grassy lawn",
        "field yard park garden outside outdoors green hill meadow pasture soccer baseball football "
        "backyard dog dogs ball playing game",
    ),
    "a mountain": (
        "mountain mountains",
        "hill cliff rock rocks climber climbing climbs peak snow slope rocky canyon hike hiking",
    ),
    "a rock": ("rock rocks boulder", "rocky cliff mountain stone stones climber climbing beach water river canyon"),
    "a tree": (
        "tree trees",
        "woods forest leaves branch park outside yard grass field path trail garden wooded log mountain "
        "hill road street backyard lawn snow snowy jungle branches bushes lake river water dirt playground bench",
    ),
    "a stick": ("stick sticks", "branch log mouth pole hockey lacrosse wood rod bat something holding"),
    "a fence": (
        "fence fenced",
        "baseball tennis yard rail railing gate park horse race track dog dogs field barrier wall chain",
    ),
    "a bench": ("bench benches", "sit sits sitting park seat seated"),
    "a wave": ("wave waves", "surf surfing surfer ocean water sea beach surfboard"),
    "a trampoline": ("trampoline", "bounce bouncing"),
    "a tennis racket": ("racket tennis racquet", "badminton"),
    "a helmet": (
        "helmet helmets",
        "biker bike bicycle motorcycle football hockey racer skateboarder climber player rider "
        "snowboarder skier uniform bmx cyclist baseball batter skateboard gear skate kayak race",
    ),
    "a fountain": ("fountain fountains", "water sprinkler spray"),
    "a microphone": ("microphone", "sing sings singing singer band concert stage music performing performs guitar mic"),
    "a flag": ("flag flags", "parade banner protest stadium race"),
    "an umbrella": ("umbrella umbrellas", "beach rain restaurant cafe parasol raining"),
}
PRESENCE = {noun: (frozenset(own.split()), frozenset(related.split())) for noun, (own, related) in PRESENCE.items()}
PERSONS_PRESENT = {"a man", "a woman", "a boy", "a girl", "a child"}
# what may mean any of them: "is there a man?" is not answered with no where a caption says "person"
ANY_PERSON = {form for table in (PERSONS, SEVERAL_PERSONS) for form, name in table.items() if name == "person"} | CROWDS

PATTERNS = set("striped colorful multicolored plaid checkered colored floral patterned".split())
# "swimming" of "swimming pool" is no verb
AFTER_A_NOUN = set(
    "pool wall shoes suit suits trunks board gear equipment track course game trail machine match event".split()
)
PAIRS = {"shorts", "pants", "boots", "shoes", "gloves"}  # "what color are the ...?"
# "looks at the water" is not in the water
ONLY_SEEN = set("water ocean sea mountain mountains hill snow river lake grass woods forest".split())
